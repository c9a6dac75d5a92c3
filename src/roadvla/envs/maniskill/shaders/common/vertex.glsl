// Positions in camera space; bindings and names are SAPIEN's.

#include "../common/camera_and_object.glsl"

layout(location = 0) in vec3 position;
layout(location = 1) in vec3 normal;
layout(location = 2) in vec2 uv;
layout(location = 3) in vec3 tangent;
layout(location = 4) in vec3 bitangent;

layout(location = 0) out vec3 outPosition;
layout(location = 1) out vec2 outUV;
layout(location = 2) out flat uvec4 outSegmentation;
layout(location = 3) out vec3 outNormal;
layout(location = 4) out vec3 outTangent;
layout(location = 5) out vec3 outBitangent;

void main() {
  mat4 toCamera = cameraBuffer.viewMatrix * objectTransformBuffer.modelMatrix;
  vec4 inCamera = toCamera * vec4(position, 1);
  outPosition = inCamera.xyz;
  mat3 turn = mat3(transpose(inverse(toCamera)));
  outNormal = normalize(turn * normal);
  outTangent = normalize(turn * tangent);
  outBitangent = normalize(turn * bitangent);
  outUV = uv;
  outSegmentation = objectDataBuffer.segmentation;
  gl_Position = cameraBuffer.projectionMatrix * inCamera;
}
