"""The same recipe trained by MMAction2 1.2.0 and here."""
