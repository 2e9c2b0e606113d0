"""Configs of MMAction2 and PySlowFast as experiments of ours; nothing in a foreign file is ever run."""
