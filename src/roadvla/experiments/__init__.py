"""Named settings and studies."""
