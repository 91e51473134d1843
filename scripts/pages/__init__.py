"""The pages of README and docs that have figures: a module a page, whose `fill` puts in tables and draws plots."""
