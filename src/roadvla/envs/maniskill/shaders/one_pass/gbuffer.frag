#version 450
#include "../common/surface.glsl"
