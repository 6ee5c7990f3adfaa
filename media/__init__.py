"""Between files and tensors: pictures, sound, video, faces, speech features, latents, weights, and the
preparation of data sets."""
