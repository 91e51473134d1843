"""Attacks: they find misclassified points, and so an upper bound on what can be verified."""

from certtrain.verification.attacks.apgd import APGD, TargetedAPGD
from certtrain.verification.attacks.attack import Attack, Ensemble, inscribed_linf_box, logits_of, predictions
from certtrain.verification.attacks.pgd import PGD

__all__ = ["APGD", "PGD", "Attack", "Ensemble", "TargetedAPGD", "inscribed_linf_box", "logits_of", "predictions"]
