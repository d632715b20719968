"""The HTTP door: transport, the composing of answers, and the one-process application."""
