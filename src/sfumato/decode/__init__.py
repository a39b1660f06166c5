"""Act 4, decode: z -> image. Ways to run a decoder (whole, in exact strips, tiled, preview), and
pixels in and out.
"""
