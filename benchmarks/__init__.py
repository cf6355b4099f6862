"""fastlora's benchmarks: the case lists and the scripts that run them. The machinery is ``fastlora.testing``."""
