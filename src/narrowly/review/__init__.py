"""The local web page where a person reads concepts and decides."""
