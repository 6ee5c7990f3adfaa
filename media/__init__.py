"""Between files and tensors: pictures, sound, video, faces, speech features, latents, weights, data sets."""
