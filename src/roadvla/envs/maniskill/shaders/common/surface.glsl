// Three directional lights and an ambient one, in one pass, and what each pixel shows. No shadows and
// no environment: the suite has neither. With LAMBERT surfaces are matt, as in recorded episodes.

#include "../common/camera_and_object.glsl"

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
layout(location = 4) in vec3 inTangent;
layout(location = 5) in vec3 inBitangent;

layout(location = 0) out vec4 outColor;
layout(location = 1) out uvec4 outSegmentation;

const float PI = 3.141592653589793;
const float GAMMA = 2.2;

// Trowbridge-Reitz distribution, Smith-Schlick visibility and Fresnel as Karis (2013) has them; the
// denominator is bounded as SAPIEN bounds it.
vec3 reflection(vec3 normal, vec3 towards, vec3 eye, float roughness, vec3 fresnel) {
  vec3 half_way = normalize(towards + eye);
  float light = clamp(dot(normal, towards), 0, 1);
  float view = clamp(dot(normal, eye), 1e-6, 1);
  float tilt = clamp(dot(normal, half_way), 1e-6, 1);
  float grazing = clamp(dot(eye, half_way), 1e-6, 1);
  float square = pow(roughness, 4);
  float shade = (roughness + 1) * (roughness + 1) / 8;
  float spread = tilt * tilt * (square - 1) + 1;
  float below = spread * spread * mix(view, 1, shade) * mix(light, 1, shade);
  vec3 share = mix(fresnel, vec3(1), exp2((-5.55473 * grazing - 6.98316) * grazing));
  return share * square * light / clamp(4 * PI * below, 1e-6, 4 * PI);
}

// The table is not drawn, for its pixels are replaced anyway: what it would hide is left out here.
// Its top, in the world frame, is 0.6 mm above where bodies rest: RL4VLA turns the stage by a quaternion
// that is not of unit length, and pictures show it.
const float TABLE_HEIGHT = 0.8701;
const vec2 TABLE_FROM = vec2(-0.75, -0.70);
const vec2 TABLE_TO = vec2(0.45, 0.70);

bool under_table() {
  vec3 eye = cameraBuffer.viewMatrixInverse[3].xyz;
  vec3 at = (cameraBuffer.viewMatrixInverse * vec4(inPosition, 1)).xyz;
  if (at.z > TABLE_HEIGHT) {
    return false;
  }
  vec2 through = mix(eye.xy, at.xy, (eye.z - TABLE_HEIGHT) / (eye.z - at.z));
  return all(greaterThan(through, TABLE_FROM)) && all(lessThan(through, TABLE_TO));
}

vec2 placed(int texture) {
  vec4 at = materialBuffer.textureTransforms[texture];
  return inUV * at.zw + at.xy;
}

bool has(int texture) {
  return (materialBuffer.textureMask & (1 << texture)) != 0;
}

void main() {
  vec4 albedo = has(0) ? texture(colorTexture, placed(0)) : materialBuffer.baseColor;
  if (albedo.a * (1 - objectDataBuffer.transparency) == 0 || under_table()) {
    discard;
  }
  vec3 normal = inNormal;
  float metallic = materialBuffer.metallic;
  float roughness = materialBuffer.roughness;
#ifndef LAMBERT
  if (has(1)) roughness = texture(roughnessTexture, placed(1)).r;
  if (has(3)) metallic = texture(metallicTexture, placed(3)).r;
  if (has(2)) {
    vec3 bent = texture(normalTexture, placed(2)).xyz * 2 - 1;
    normal = mat3(inTangent, inBitangent, inNormal) * bent;
  }
#endif
  if (objectDataBuffer.shadeFlat != 0) {
    normal = cross(dFdx(inPosition), dFdy(inPosition));
  }
  normal = normalize(faceforward(normal, inPosition, normal));
  vec3 diffuse = albedo.rgb * (1 - metallic);
#ifdef LAMBERT
  vec3 color = materialBuffer.emission.rgb;
#else
  vec4 emission = has(4) ? texture(emissionTexture, placed(4)) : materialBuffer.emission;
  vec3 color = emission.rgb * emission.a;
#endif
  color += albedo.rgb * sceneBuffer.ambientLight.rgb;
  for (int i = 0; i < 3; ++i) {
    vec3 towards = -mat3(cameraBuffer.viewMatrix) * sceneBuffer.directionalLights[i].direction.xyz;
    vec3 sent = diffuse * max(dot(normal, towards), 0) / PI;
#ifndef LAMBERT
    vec3 fresnel = mix(vec3(materialBuffer.fresnel * 0.08), albedo.rgb, metallic);
    sent += reflection(normal, towards, -normalize(inPosition), roughness, fresnel);
#endif
    color += sceneBuffer.directionalLights[i].emission.rgb * sent;
  }
  outColor = vec4(pow(clamp(color, 0, 1), vec3(1 / GAMMA)), 1);
  outSegmentation = inSegmentation;
}
