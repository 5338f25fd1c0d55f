"""Controlled environments with a known gold reward, written as folders that data and policy read like any other."""
