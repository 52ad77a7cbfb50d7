# Images that stand in for those of docker-compose.yml where no registry can be reached: Debian's
# packages, and servers of the tests. Built by tests/compose_docker.py; one stage for each image.
ARG BASE

FROM ${BASE} AS redis

FROM ${BASE} AS rabbitmq
# RabbitMQ's own scripts: Debian's wrappers know one folder and one user.
ENV PATH=/usr/lib/rabbitmq/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/var/lib/rabbitmq
ENTRYPOINT ["sh", "-c", "chown -R rabbitmq: /var/lib/rabbitmq && exec setpriv --reuid rabbitmq --regid rabbitmq --init-groups rabbitmq-server"]

FROM ${BASE} AS prometheus
RUN mkdir -p /prometheus && chown nobody /prometheus
COPY alert_rules.yml /opt/
USER nobody
ENTRYPOINT ["prometheus"]

FROM ${BASE} AS s3
RUN mkdir -p /data
COPY stand_ins.py s3_server.py /opt/
USER 10001
ENV PYTHONPATH=/opt/python
ENTRYPOINT ["python3", "/opt/stand_ins.py", "s3"]

FROM ${BASE} AS jaeger
COPY stand_ins.py otlp_receiver.py /opt/
USER 10001
ENV PYTHONPATH=/opt/python
ENTRYPOINT ["python3", "/opt/stand_ins.py", "jaeger"]
