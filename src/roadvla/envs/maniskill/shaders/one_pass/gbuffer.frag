#version 450
// Albedo under ambient light and three directional lights, Lambert, in one pass, and what each pixel
// shows. No shadows, no specular part, no environment: under a green screen none of them is seen.

layout(set = 0, binding = 0) uniform CameraBuffer {
  mat4 viewMatrix;
  mat4 projectionMatrix;
  mat4 viewMatrixInverse;
  mat4 projectionMatrixInverse;
  float width;
  float height;
} cameraBuffer;

layout(set = 1, binding = 0) uniform ObjectTransformBuffer {
  mat4 modelMatrix;
} objectTransformBuffer;

layout(set = 1, binding = 1) uniform ObjectDataBuffer {
  uvec4 segmentation;
  float transparency;
  int shadeFlat;
} objectDataBuffer;

layout(set = 2, binding = 0) uniform MaterialBuffer {
  vec4 emission;
  vec4 baseColor;
  float fresnel;
  float roughness;
  float metallic;
  float transmission;
  float ior;
  float transmissionRoughness;
  int textureMask;
  int padding1;
  vec4 textureTransforms[6];
} materialBuffer;

layout(set = 2, binding = 1) uniform sampler2D colorTexture;
layout(set = 2, binding = 2) uniform sampler2D roughnessTexture;
layout(set = 2, binding = 3) uniform sampler2D normalTexture;
layout(set = 2, binding = 4) uniform sampler2D metallicTexture;
layout(set = 2, binding = 5) uniform sampler2D emissionTexture;
layout(set = 2, binding = 6) uniform sampler2D transmissionTexture;

struct PointLight {
  vec4 position;
  vec4 emission;
};

struct DirectionalLight {
  vec4 direction;
  vec4 emission;
};

struct SpotLight {
  vec4 position;
  vec4 direction;
  vec4 emission;
};

layout(set = 3, binding = 0) uniform SceneBuffer {
  vec4 ambientLight;
  PointLight pointLights[10];
  DirectionalLight directionalLights[3];
  SpotLight spotLights[10];
  SpotLight texturedLights[1];
} sceneBuffer;

layout(location = 0) in vec3 inPosition;
layout(location = 1) in vec2 inUV;
layout(location = 2) in flat uvec4 inSegmentation;
layout(location = 3) in vec3 inNormal;

layout(location = 0) out vec4 outColor;
layout(location = 1) out uvec4 outSegmentation;

const float PI = 3.141592653589793;
const float GAMMA = 2.2;

void main() {
  vec4 albedo = materialBuffer.baseColor;
  if ((materialBuffer.textureMask & 1) != 0) {
    vec4 placed = materialBuffer.textureTransforms[0];
    albedo = texture(colorTexture, inUV * placed.zw + placed.xy);
  }
  if (albedo.a * (1 - objectDataBuffer.transparency) == 0) {
    discard;
  }
  vec3 normal = inNormal;
  if (objectDataBuffer.shadeFlat != 0) {
    normal = cross(dFdx(inPosition), dFdy(inPosition));
    normal = dot(normal, inPosition) > 0 ? -normal : normal;  // towards the camera
  }
  normal = normalize(normal);
  vec3 light = sceneBuffer.ambientLight.rgb;
  for (int i = 0; i < 3; ++i) {
    vec3 towards = -mat3(cameraBuffer.viewMatrix) * sceneBuffer.directionalLights[i].direction.xyz;
    light += sceneBuffer.directionalLights[i].emission.rgb * max(dot(normal, towards), 0) / PI;
  }
  vec3 color = materialBuffer.emission.rgb + albedo.rgb * light;
  outColor = vec4(pow(clamp(color, 0, 1), vec3(1 / GAMMA)), 1);
  outSegmentation = inSegmentation;
}
