"""Subnets without a router: searched, estimated from scores, laid between trained ones."""
