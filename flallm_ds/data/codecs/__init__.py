"""Encode and decode the frames of clips: Motion-JPEG AVI, H.264, and any source video."""
