"""The learned choice of a subnet per budget: logits, sampling, schedules, masks and gates, the budget loss, repair."""
