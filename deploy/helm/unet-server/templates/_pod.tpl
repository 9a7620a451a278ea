{{/* The container, for the Deployment and for KServe. Takes the root. */}}
{{- define "unet.container" -}}
{{- $weights := or .Values.weights.volume .Values.kserve.storageUri -}}
name: {{ .Values.kserve.enabled | ternary "kserve-container" "unet-server" }}
image: {{ include "unet.image" . }}
imagePullPolicy: {{ .Values.image.pullPolicy }}
ports:
  - {name: http, containerPort: 8000, protocol: TCP}
env:
  {{- if eq .Values.device "cuda" }}
  # not auto: on a node without a driver the pod must fail instead of using the CPU
  - {name: UNET_DEVICE, value: cuda}
  {{- else }}
  - {name: UNET_DEVICE, value: cpu}
  {{- end }}
  - {name: UNET_DRAIN_S, value: {{ .Values.drainSeconds | quote }}}
  {{- range $name, $_ := .Values.settings }}
  - {name: UNET_{{ $name }}, value: {{ include "unet.setting" (dict "root" $ "name" $name "default" "") | quote }}}
  {{- end }}
  {{- if .Values.apiKeys.secretName }}
  - {name: UNET_API_KEYS_FILE, value: /etc/unet-server/keys/{{ .Values.apiKeys.secretKey }}}
  {{- end }}
  {{- if $weights }}
  {{- if .Values.kserve.storageUri }}
  # KServe downloads this into /mnt/models before the container starts
  - {name: STORAGE_URI, value: {{ .Values.kserve.storageUri | quote }}}
  {{- end }}
  - {name: UNET_WEIGHTS_DIR, value: {{ if .Values.kserve.storageUri }}/mnt/models{{ else }}/weights{{ end }}}
  - {name: UNET_RELOAD, value: {{ .Values.weights.reload | ternary "on" "off" | quote }}}
  {{- end }}
  {{- with .Values.ingress.trustedProxies }}
  - {name: FORWARDED_ALLOW_IPS, value: {{ . | quote }}}
  {{- end }}
  {{- with .Values.extraEnv }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
startupProbe:
  httpGet: {path: /startupz, port: http}
  periodSeconds: 1
  timeoutSeconds: 2
  failureThreshold: {{ .Values.startSeconds }}
readinessProbe:
  httpGet: {path: /readyz, port: http}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
# 503 only if the engine is hung or lost, which a restart repairs
livenessProbe:
  httpGet: {path: /livez, port: http}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 3
lifecycle:
  preStop:
    # After SIGTERM the service rejects requests, so wait until the endpoints are updated
    exec: {command: [sleep, {{ .Values.preStopSeconds | quote }}]}
resources:
  {{- toYaml .Values.resources | nindent 2 }}
securityContext:
  {{- toYaml .Values.securityContext | nindent 2 }}
volumeMounts:
  - {name: tmp, mountPath: /tmp}
  {{- if .Values.apiKeys.secretName }}
  # a folder and not a subPath, which would keep the keys that the pod started with
  - {name: keys, mountPath: /etc/unet-server/keys, readOnly: true}
  {{- end }}
  {{- if .Values.weights.volume }}
  - name: weights
    mountPath: /weights
    {{- with .Values.weights.subPath }}
    subPath: {{ . }}
    {{- end }}
    readOnly: true
  {{- end }}
{{- end }}

{{/* Annotations of the pod: without a ServiceMonitor and keys, those by which many Prometheus servers find it. */}}
{{- define "unet.podAnnotations" -}}
{{- if not (or .Values.serviceMonitor.enabled .Values.apiKeys.secretName) }}
prometheus.io/scrape: "true"
prometheus.io/port: "8000"
prometheus.io/path: /metrics
{{- end }}
{{- with .Values.podAnnotations }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* The rest of the pod. Takes the root. */}}
{{- define "unet.pod" -}}
automountServiceAccountToken: false
# otherwise a Service called "unet" sets UNET_PORT to tcp://...
enableServiceLinks: false
terminationGracePeriodSeconds: {{ add .Values.preStopSeconds (ceil .Values.drainSeconds) 10 }}
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
topologySpreadConstraints:
  - topologyKey: kubernetes.io/hostname
    maxSkew: 1
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
        {{- include "unet.selector" . | nindent 8 }}
containers:
  - {{ include "unet.container" . | indent 4 | trim }}
volumes:
  - name: tmp
    emptyDir: {sizeLimit: {{ .Values.tmpSize }}}
  {{- with .Values.apiKeys.secretName }}
  - name: keys
    secret:
      secretName: {{ . }}
      defaultMode: 0444
      items: [{key: {{ $.Values.apiKeys.secretKey }}, path: {{ $.Values.apiKeys.secretKey }}}]
  {{- end }}
  {{- with .Values.weights.volume }}
  - name: weights
    {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}
