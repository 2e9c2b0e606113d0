"""Configs of MMAction2 and PySlowFast as experiments here; nothing in a foreign file is ever run."""
