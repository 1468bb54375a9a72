"""The running bridge over real sockets, in front of a scripted upstream."""
