"""Many runs: trained as one study, tuned, compared."""
