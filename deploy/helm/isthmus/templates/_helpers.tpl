{{- define "isthmus.fullname" -}}
{{- if contains "isthmus" .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-isthmus" .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "isthmus.selector" -}}
app.kubernetes.io/name: isthmus
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{- define "isthmus.labels" -}}
{{ include "isthmus.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "isthmus.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "isthmus.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "isthmus.redisEnv" -}}
- name: REDIS_URL
{{- if .Values.redis.enabled }}
  value: {{ printf "redis://%s-redis:6379/0" (include "isthmus.fullname" .) }}
{{- else if .Values.redis.existingSecret }}
  valueFrom:
    secretKeyRef:
      name: {{ required "redis.existingSecret.name" .Values.redis.existingSecret.name }}
      key: {{ required "redis.existingSecret.key" .Values.redis.existingSecret.key }}
{{- else }}
  value: {{ required "redis.enabled is false: set redis.url or redis.existingSecret" .Values.redis.url | quote }}
{{- end }}
{{- end -}}

{{/*
Ready means gRPC health says SERVING. A gateway does so while it has a decode worker; without one it
is alive all the same, so its liveness is asked over HTTP.
*/}}
{{- define "isthmus.probes" -}}
{{- $alive := ternary "httpGet: {path: /live, port: http}" "grpc: {port: 50051}" (eq .component "gateway") -}}
startupProbe:
  {{ $alive }}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 300
readinessProbe:
  grpc: {port: 50051}
  periodSeconds: 5
  timeoutSeconds: 2
  failureThreshold: 2
livenessProbe:
  {{ $alive }}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
{{- end -}}

{{/* How many ranks a layout such as "tp=2,pp=2" has; 1 for none. As ParallelLayout.parse counts. */}}
{{- define "isthmus.numRanks" -}}
{{- $sizes := dict "tp" 1 "pp" 1 "sp" 1 "dp" 1 "ep" 1 -}}
{{- range $part := compact (splitList "," .) -}}
  {{- $pair := splitList "=" $part -}}
  {{- $_ := set $sizes (first $pair) (atoi (last $pair)) -}}
{{- end -}}
{{- $inside := mul $sizes.tp $sizes.sp -}}
{{- if and (not (contains "dp=" .)) (gt (int $sizes.ep) (int $inside)) -}}
  {{- $_ := set $sizes "dp" (div $sizes.ep $inside) -}}
{{- end -}}
{{- mul $inside $sizes.pp $sizes.dp -}}
{{- end -}}

{{/*
Pod template of one role. Arguments: root, component, pool (its values), args, ports; and of a group
of ranks rank: "leader", which serves, or "follower".
*/}}
{{- define "isthmus.pod" -}}
{{- $values := .root.Values -}}
metadata:
  labels:
    {{- include "isthmus.labels" . | nindent 4 }}
  {{- if ne .rank "follower" }}
  annotations:
    prometheus.io/scrape: "true"
    prometheus.io/port: {{ .metricsPort | quote }}
  {{- end }}
spec:
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- with $values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  terminationGracePeriodSeconds: {{ add .pool.drainSeconds .pool.preStopSeconds 10 }}
  securityContext:
    {{- include "isthmus.podSecurity" . | nindent 4 }}
  containers:
    - name: {{ .component }}
      image: {{ printf "%s:%s" $values.image.repository ($values.image.tag | default .root.Chart.AppVersion) | quote }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      args:
        {{- toYaml (concat .args .pool.extraArgs) | nindent 8 }}
      env:
        - name: POD_IP
          valueFrom:
            fieldRef: {fieldPath: status.podIP}
        - name: OMP_NUM_THREADS
          valueFrom:
            resourceFieldRef: {containerName: {{ .component }}, resource: limits.cpu}
        {{- if .rank }}
        # LeaderWorkerSet puts its variables before these.
        - {name: RANK, value: $(LWS_WORKER_INDEX)}
        - {name: WORLD_SIZE, value: $(LWS_GROUP_SIZE)}
        - {name: MASTER_ADDR, value: $(LWS_LEADER_ADDRESS)}
        - {name: MASTER_PORT, value: "29500"}
        {{- end }}
        {{- include "isthmus.redisEnv" .root | nindent 8 }}
        {{- with $values.telemetry.otlpEndpoint }}
        - name: OTEL_EXPORTER_OTLP_ENDPOINT
          value: {{ . | quote }}
        {{- end }}
        {{- with $values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      ports:
        {{- range $name, $port := .ports }}
        - name: {{ $name }}
          containerPort: {{ $port }}
        {{- end }}
      {{- if ne .rank "follower" }}
      {{- include "isthmus.probes" . | nindent 6 }}
      {{- end }}
      lifecycle:
        preStop:
          sleep: {seconds: {{ .pool.preStopSeconds }}}
      resources:
        {{- toYaml .pool.resources | nindent 8 }}
      securityContext:
        {{- include "isthmus.containerSecurity" . | nindent 8 }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: cache, mountPath: /cache}
        {{- if $values.model.volume }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
        {{- if .pool.spillVolume }}
        - {name: spill, mountPath: /spill}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir: {}
    - name: cache
      {{- toYaml $values.cache.volume | nindent 6 }}
    {{- with $values.model.volume }}
    - name: models
      {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with .pool.spillVolume }}
    - name: spill
      {{- toYaml . | nindent 6 }}
    {{- end }}
  {{- with .pool.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .pool.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .pool.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end -}}

{{/*
Deployment, or LeaderWorkerSet where a worker has several ranks, autoscaler and disruption budget of
one role; arguments as for isthmus.pod.
*/}}
{{- define "isthmus.pool" -}}
{{- $name := printf "%s-%s" (include "isthmus.fullname" .root) .component -}}
{{- $numRanks := include "isthmus.numRanks" (.pool.parallel | default "") | atoi -}}
{{- $target := dict "apiVersion" "apps/v1" "kind" "Deployment" "name" $name -}}
{{- if gt $numRanks 1 -}}
{{- $target = dict "apiVersion" "leaderworkerset.x-k8s.io/v1" "kind" "LeaderWorkerSet" "name" $name -}}
apiVersion: {{ $target.apiVersion }}
kind: {{ $target.kind }}
metadata:
  name: {{ $name }}
  labels:
    {{- include "isthmus.labels" . | nindent 4 }}
spec:
  {{- if not .pool.autoscaling.enabled }}
  replicas: {{ .pool.replicas }}
  {{- end }}
  rolloutStrategy:
    type: RollingUpdate
    rollingUpdateConfiguration: {maxUnavailable: 0, maxSurge: 1}
  leaderWorkerTemplate:
    size: {{ $numRanks }}
    # The ranks of a worker end together, and all must be new.
    restartPolicy: RecreateGroupOnPodRestart
    leaderTemplate:
      {{- include "isthmus.pod" (merge (dict "rank" "leader") .) | nindent 6 }}
    workerTemplate:
      {{- include "isthmus.pod" (merge (dict "rank" "follower") .) | nindent 6 }}
{{- else -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ $name }}
  labels:
    {{- include "isthmus.labels" . | nindent 4 }}
spec:
  {{- if not (.pool.autoscaling).enabled }}
  replicas: {{ .pool.replicas }}
  {{- end }}
  strategy:
    rollingUpdate: {maxUnavailable: 0, maxSurge: 1}
  selector:
    matchLabels:
      {{- include "isthmus.selector" . | nindent 6 }}
  template:
    {{- include "isthmus.pod" (merge (dict "rank" "") .) | nindent 4 }}
{{- end }}
{{- if (.pool.autoscaling).enabled }}
---
apiVersion: autoscaling/v2
kind: HorizontalPodAutoscaler
metadata:
  name: {{ $name }}
  labels:
    {{- include "isthmus.labels" . | nindent 4 }}
spec:
  scaleTargetRef: {{- toYaml $target | nindent 4 }}
  minReplicas: {{ .pool.autoscaling.minReplicas }}
  maxReplicas: {{ .pool.autoscaling.maxReplicas }}
  metrics:
    - type: Resource
      resource:
        name: cpu
        target: {type: Utilization, averageUtilization: {{ .pool.autoscaling.targetCpuPercent }}}
    {{- with .pool.autoscaling.metrics }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}
{{- if .root.Values.podDisruptionBudget.enabled }}
---
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ $name }}
  labels:
    {{- include "isthmus.labels" . | nindent 4 }}
spec:
  maxUnavailable: {{ .root.Values.podDisruptionBudget.maxUnavailable }}
  selector:
    matchLabels:
      {{- include "isthmus.selector" . | nindent 6 }}
{{- end }}
{{- end -}}
