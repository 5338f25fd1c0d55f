"""What a policy is worth: samples, KL, gold reward, win rate."""
