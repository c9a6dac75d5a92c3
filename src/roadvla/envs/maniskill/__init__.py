"""RL4VLA's PutOnPlateInScene25 suite on ManiSkill 3: 17 ids, each a row of ``settings.py``."""
