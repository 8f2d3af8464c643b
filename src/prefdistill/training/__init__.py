"""Trainers: the student with any method, and TRL's for SFT, DPO and reward models."""
