#version 450
#define LAMBERT
#include "../common/surface.glsl"
