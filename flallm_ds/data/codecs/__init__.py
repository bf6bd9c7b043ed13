"""How a clip's frames are stored and decoded: Motion-JPEG AVI, H.264, and any source video."""
