"""A package, since OpenRLHF installs another one of this name."""
