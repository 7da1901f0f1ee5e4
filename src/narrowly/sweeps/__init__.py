"""Many runs from one file, compared fairly: models, data, defenses, hyper-parameters, seeds."""
