"""From a robot's raw observation to a policy's inputs, and from its output to robot actions.

A robot is data: `conf/robot/*.yaml`, or a file of the user's, read by `spec`.
"""
