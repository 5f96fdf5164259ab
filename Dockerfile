# One image for every service: `python -m services.<name>` is the command that differs.
# `--target s3` builds the S3 server of the development stack from the same pinned jars as the stack without Docker.

FROM python:3.11-slim-bookworm AS build
WORKDIR /app
COPY requirements.lock ./
RUN python -m venv /venv \
 && /venv/bin/pip --disable-pip-version-check install --no-cache-dir --require-hashes -r requirements.lock
COPY protos ./protos
COPY deploy/gen.py ./deploy/gen.py
RUN PATH="/venv/bin:$PATH" python deploy/gen.py

FROM python:3.11-slim-bookworm AS services
RUN useradd --system --uid 10001 --home-dir /app groundswell && mkdir /state && chown groundswell /state
WORKDIR /app
COPY --from=build /venv /venv
COPY --from=build /app/gen ./gen
COPY libs ./libs
COPY services ./services
COPY clients ./clients
COPY deploy ./deploy
ENV PATH="/venv/bin:$PATH" PYTHONPATH="/app:/app/gen" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER groundswell
ENTRYPOINT ["python", "-m"]
CMD ["services.registry"]

FROM maven:3.9-eclipse-temurin-17 AS s3-jars
COPY deploy/local/s3/pom.xml /pom/pom.xml
RUN mvn -q -B -C -f /pom/pom.xml dependency:copy-dependencies -DoutputDirectory=/jars -DincludeScope=runtime

FROM eclipse-temurin:17-jre AS s3
RUN useradd --system --uid 10001 s3 && mkdir /data && chown s3 /data
COPY --from=s3-jars /jars /jars
COPY deploy/local/s3/logback.xml deploy/container/s3.sh /etc/s3/
USER s3
ENTRYPOINT ["sh", "/etc/s3/s3.sh"]
