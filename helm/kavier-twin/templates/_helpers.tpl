{{- define "kavier-twin.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "kavier-twin.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains (include "kavier-twin.name" .) .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "kavier-twin.name" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "kavier-twin.selectorLabels" -}}
app.kubernetes.io/name: {{ include "kavier-twin.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "kavier-twin.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{ include "kavier-twin.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- define "kavier-twin.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "kavier-twin.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* A digest alone, or with the tag if one is given: REGISTRY/REPOSITORY:TAG@DIGEST. */}}
{{- define "kavier-twin.image" -}}
{{- $image := .Values.image -}}
{{- with $image.registry }}{{ trimSuffix "/" . }}/{{ end -}}
{{- $image.repository -}}
{{- if or $image.tag (not $image.digest) }}:{{ $image.tag | default .Chart.AppVersion }}{{ end -}}
{{- with $image.digest }}@{{ . }}{{ end -}}
{{- end -}}

{{- define "kavier-twin.givenSettings" -}}
{{- .Values.settings | default (.Files.Get "samples/prometheus-only.yaml" | fromYaml).settings | toYaml -}}
{{- end -}}

{{/* The settings file: the given settings, with those that the chart sets. */}}
{{- define "kavier-twin.settings" -}}
{{- $fixed := dict "http" (dict "host" "0.0.0.0" "port" 9469) "checkpoints" (dict "directory" "/var/lib/kavier-twin") -}}
{{- mergeOverwrite (include "kavier-twin.givenSettings" . | fromYaml) $fixed | toYaml -}}
{{- end -}}

{{/* The claim in which the StatefulSet keeps checkpoints; empty: it has none of its own. */}}
{{- define "kavier-twin.claimSpec" -}}
{{- if and .Values.persistence.enabled (not .Values.persistence.existingClaim) -}}
accessModes: {{- toYaml .Values.persistence.accessModes | nindent 2 }}
{{- if eq .Values.persistence.storageClassName "-" }}
storageClassName: ""
{{- else if .Values.persistence.storageClassName }}
storageClassName: {{ .Values.persistence.storageClassName | quote }}
{{- end }}
resources:
  requests: {storage: {{ .Values.persistence.size | quote }}}
{{- end -}}
{{- end -}}
