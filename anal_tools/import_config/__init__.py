"""Convert configs of MMAction2 and PySlowFast to experiments; never execute anything in a foreign file."""
