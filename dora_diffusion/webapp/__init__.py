"""The web app: one file per tab. Callbacks only build requests for the layers that the command line uses too."""
