"""The rim towards other peers: one interface (`port`), two carriers (`memory`, `libp2p`)."""
