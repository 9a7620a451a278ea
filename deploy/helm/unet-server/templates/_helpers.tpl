{{- define "unet.name" -}}
{{ .Values.nameOverride | default .Chart.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "unet.fullname" -}}
{{- $name := include "unet.name" . -}}
{{- if .Values.fullnameOverride -}}
{{ .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains $name .Release.Name -}}
{{ .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" }}
{{- end -}}
{{- end }}

{{- define "unet.selector" -}}
app.kubernetes.io/name: {{ include "unet.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "unet.labels" -}}
{{ include "unet.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "unet.image" -}}
{{- $tag := .Values.image.tag | default (printf "%s%s" .Chart.AppVersion (eq .Values.device "cuda" | ternary "-cuda" "")) -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ $tag }}
{{- end -}}
{{- end }}

{{- define "unet.monitorSecretKey" -}}
{{- if .Values.apiKeys.secretName -}}
{{ required "serviceMonitor.secretKey: /metrics needs a key where apiKeys.secretName is set" .Values.serviceMonitor.secretKey }}
{{- end -}}
{{- end }}

{{/* A setting of the service as it is in effect: .name, .default and the root as .root */}}
{{- define "unet.setting" -}}
{{- $value := get .root.Values.settings .name -}}
{{- /* Helm reads numbers of values files as floats, which print as 1e+06 */ -}}
{{- if kindIs "float64" $value -}}
{{- $value = eq $value (floor $value) | ternary ($value | int64 | toString) ($value | toString) -}}
{{- end -}}
{{ $value | toString | default .default }}
{{- end }}

{{/*
Devices' worth of work: busy devices, and the waiting windows as work for one minute. Without any
series it is empty, so that a broken Prometheus changes nothing.
*/}}
{{- define "unet.loadQuery" -}}
{{- $service := printf "%s%s" (include "unet.fullname" .) (.Values.kserve.enabled | ternary "-predictor" "") -}}
{{- $own := printf "namespace=%q,service=%q" .Release.Namespace $service -}}
{{- $labels := printf "{%s}" (.Values.autoscaling.keda.selector | default $own) -}}
(sum(rate(unet_batch_seconds_sum{{ $labels }}[1m])) or 0 * sum(unet_ready{{ $labels }}))
+ (sum(unet_windows_waiting{{ $labels }} / (unet_engine_windows_per_second{{ $labels }} > 0)) / 60 or vector(0))
{{- end }}

{{/* How quickly an autoscaler follows the load. */}}
{{- define "unet.scalingBehavior" -}}
scaleUp:
  stabilizationWindowSeconds: 0
  policies:
    - {type: Percent, value: 100, periodSeconds: 30}
    - {type: Pods, value: 2, periodSeconds: 30}
scaleDown:
  stabilizationWindowSeconds: 300
  policies:
    - {type: Pods, value: 1, periodSeconds: 60}
{{- end }}

{{- define "unet.strategy" -}}
type: RollingUpdate
rollingUpdate: {maxSurge: 1, maxUnavailable: 0}
{{- end }}
