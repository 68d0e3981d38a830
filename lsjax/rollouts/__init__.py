"""Rollouts for reinforcement learning, with drafts of the policy's own first layers."""
