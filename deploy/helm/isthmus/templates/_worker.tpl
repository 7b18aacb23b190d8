{{/* One pool of workers: they find the mesh through Redis, so no Service stands before them. */}}
{{- define "isthmus.worker" -}}
{{- $args := list
  (printf "%s-worker" .role)
  (printf "--model=%s" .root.Values.model.id)
  "--redis-url=$(REDIS_URL)"
  "--host=0.0.0.0"
  "--port=50051"
  "--data-address=0.0.0.0:50052"
  "--advertise-address=$(POD_IP):50051"
  "--metrics-port=9100"
  (printf "--dtype=%s" .root.Values.model.dtype)
  (printf "--kv-dtype=%s" .root.Values.model.kvDtype)
  (printf "--device=%s" .root.Values.model.device)
  (printf "--drain-grace-s=%v" .pool.drainSeconds)
-}}
{{- with .pool.parallel -}}
  {{- $args = append $args (printf "--parallel=%s" .) -}}
{{- end -}}
{{- $ports := dict "grpc" 50051 "metrics" 9100 "data" 50052 -}}
{{ include "isthmus.pool" (dict
  "root" .root "component" .role "pool" .pool "args" $args
  "ports" $ports "metricsPort" 9100
) }}
{{- end -}}
