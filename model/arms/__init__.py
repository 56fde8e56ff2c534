"""What the learner is measured against: one small class a method, all with model/evaluate.py's Arm."""
