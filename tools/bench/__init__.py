"""What each phase of training costs on this machine, against the limit that binds it."""
