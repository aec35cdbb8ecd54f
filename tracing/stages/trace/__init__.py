"""The stage `trace`: facts to effects and a plan of layers."""
