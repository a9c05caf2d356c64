{{/* What the schema cannot express: values that exclude each other, or that nothing would use. Each failure is one sentence. */}}
{{- define "kavier-twin.checks" -}}
{{- $values := .Values -}}

{{- /* Labels and annotations of the chart's own. */ -}}
{{- $own := keys (include "kavier-twin.labels" . | fromYaml) -}}
{{- $given := dict "podLabels" $values.podLabels "serviceMonitor.additionalLabels" $values.serviceMonitor.additionalLabels
    "prometheusRule.additionalLabels" $values.prometheusRule.additionalLabels "grafanaDashboards.labels" $values.grafanaDashboards.labels -}}
{{- range $name, $labels := $given -}}
{{- range $label, $_ := $labels -}}
{{- if has $label $own -}}{{- fail (printf "%s: the chart sets the label %s; remove it" $name $label) -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- if hasKey $values.podAnnotations "checksum/settings" -}}
{{- fail "podAnnotations: the chart sets the annotation checksum/settings; remove it" -}}
{{- end -}}

{{- /* Names that the pod has already. */ -}}
{{- $volumes := list "settings" "state" "tmp" "ca" -}}
{{- range $name, $_ := $values.secrets -}}{{- $volumes = append $volumes (printf "secret-%s" $name) -}}{{- end -}}
{{- range $values.extraVolumes -}}
{{- if has .name $volumes -}}{{- fail (printf "extraVolumes: the chart has a volume named %s; choose another name" .name) -}}{{- end -}}
{{- end -}}
{{- range concat $values.sidecars $values.initContainers -}}
{{- if eq .name "twin" -}}{{- fail "sidecars and initContainers: the chart has a container named twin; choose another name" -}}{{- end -}}
{{- end -}}
{{- range $values.extraEnv -}}
{{- if and (eq .name "RAY_ADDRESS") $values.ray.address -}}
{{- fail "extraEnv: ray.address sets RAY_ADDRESS; remove one of them" -}}
{{- end -}}
{{- end -}}

{{- /* Values that nothing would use. */ -}}
{{- if and $values.persistence.existingClaim (not $values.persistence.enabled) -}}
{{- fail "persistence.existingClaim is not used while persistence.enabled is false; set it to true or remove the claim" -}}
{{- end -}}
{{- if and $values.persistence.existingClaim $values.persistence.storageClassName -}}
{{- fail "persistence.storageClassName is not used with persistence.existingClaim; remove one of them" -}}
{{- end -}}
{{- if and $values.ca.configMap $values.ca.secret -}}
{{- fail "ca: give either configMap or secret" -}}
{{- end -}}
{{- if and $values.serviceAccount.annotations (not $values.serviceAccount.create) -}}
{{- fail "serviceAccount.annotations are not used while serviceAccount.create is false; annotate the account itself" -}}
{{- end -}}
{{- if and $values.ingress.enabled (not $values.ingress.hosts) -}}
{{- fail "ingress.hosts is empty; give a host, such as [{host: twin.example.org, paths: [{path: /, pathType: Prefix}]}]" -}}
{{- end -}}
{{- if and $values.httpRoute.enabled (not $values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.parentRefs is empty; name the Gateway, such as [{name: GATEWAY}]" -}}
{{- end -}}
{{- $settings := include "kavier-twin.givenSettings" . | fromYaml | toJson -}}
{{- if and $values.ray.address (not (contains "\"executor\":\"ray\"" $settings)) -}}
{{- fail "ray.address is not used, because no pool's settings have forecast.executor: ray; add it or remove the address" -}}
{{- end -}}

{{- /* Secrets that the settings name and the pod would not have. */ -}}
{{- $variables := list -}}
{{- range $values.extraEnv -}}{{- $variables = append $variables .name -}}{{- end -}}
{{- range regexFindAll "\"[^\"]+\":[{]\"env\":\"[^\"]+\"[}]" $settings -1 -}}
{{- $place := regexReplaceAll "^\"([^\"]+)\".*" . "${1}" -}}
{{- $variable := regexReplaceAll ".*\"env\":\"([^\"]+)\"[}]$" . "${1}" -}}
{{- if not (or (has $place (list "engines" "gpus")) (has $variable $variables) $values.envFrom) -}}
{{- fail (printf "settings: %s names the environment variable %s, which the pod does not have; add it to extraEnv or envFrom" $place $variable) -}}
{{- end -}}
{{- end -}}
{{- range regexFindAll "\"/run/secrets/[^/\"]+/" $settings -1 -}}
{{- $name := trimSuffix "/" (trimPrefix "\"/run/secrets/" .) -}}
{{- $mounted := false -}}
{{- range $values.extraVolumeMounts -}}{{- if hasPrefix .mountPath (printf "/run/secrets/%s/" $name) -}}{{- $mounted = true -}}{{- end -}}{{- end -}}
{{- if not (or $mounted (hasKey $values.secrets $name)) -}}
{{- fail (printf "settings: a file below /run/secrets/%s is named, which the pod does not have; add %s to secrets" $name $name) -}}
{{- end -}}
{{- end -}}
{{- if and (contains "\"/run/ca/" $settings) (not (or $values.ca.configMap $values.ca.secret)) -}}
{{- fail "settings: a file below /run/ca is named, which the pod does not have; set ca.configMap or ca.secret" -}}
{{- end -}}
{{- end -}}

{{/* Kubernetes forbids to change some fields of a StatefulSet. Says so in words, before the API server answers "Forbidden". */}}
{{- define "kavier-twin.upgradeChecks" -}}
{{- $name := include "kavier-twin.fullname" . -}}
{{- $namespace := .Release.Namespace -}}
{{- $found := lookup "apps/v1" "StatefulSet" $namespace $name -}}
{{- if $found -}}
{{- $orphan := printf "kubectl -n %s delete statefulset %s --cascade=orphan" $namespace $name -}}
{{- if ne (dig "spec" "podManagementPolicy" "OrderedReady" $found) "Parallel" -}}
{{- fail (printf "the StatefulSet %s is of a chart before 0.2.0, and Kubernetes forbids to change its podManagementPolicy. Run this once, which keeps the pod and its volume, and upgrade again: %s" $name $orphan) -}}
{{- end -}}
{{- $was := "no volume of its own" -}}
{{- range dig "spec" "volumeClaimTemplates" list $found -}}
{{- $was = include "kavier-twin.claimWords" .spec -}}
{{- end -}}
{{- $is := "no volume of its own" -}}
{{- with include "kavier-twin.claimSpec" . -}}
{{- $is = include "kavier-twin.claimWords" (fromYaml .) -}}
{{- end -}}
{{- if ne $was $is -}}
{{- fail (printf "persistence: the StatefulSet %s has %s, the values ask for %s, and Kubernetes forbids that change. Set the values back, or see \"Changing persistence\" in the chart's README; it begins with: %s" $name $was $is $orphan) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "kavier-twin.claimWords" -}}
{{- $class := "the default class" -}}
{{- if hasKey . "storageClassName" -}}{{- $class = printf "class %q" .storageClassName -}}{{- end -}}
{{- printf "a claim of %s, %s, %s" .resources.requests.storage $class (join " and " .accessModes) -}}
{{- end -}}
