#!/bin/sh
# Starts S3Proxy over /data. The secret comes from the environment and is written where only this user can read it.
set -eu
umask 077
cat > /tmp/s3.properties <<P
s3proxy.endpoint=http://0.0.0.0:19900
s3proxy.authorization=aws-v2-or-v4
s3proxy.identity=${GROUNDSWELL_S3_ACCESS_KEY:?}
s3proxy.credential=${GROUNDSWELL_S3_SECRET_KEY:?}
jclouds.provider=filesystem-nio2
jclouds.filesystem.basedir=/data
P
exec java -Xmx512m -XX:+UseSerialGC -Dlogback.configurationFile=/etc/s3/logback.xml -cp '/jars/*' \
  org.gaul.s3proxy.Main --properties /tmp/s3.properties
