"""End-to-end encryption: devices of the bridge, what they encrypt and what they read.

This room alone knows Olm and Megolm, and in it `olm.py` alone knows the library, which the extra `e2ee` installs.
"""
