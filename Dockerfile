# The server on a CPU: docker build -t hyperclip . && docker run -p 127.0.0.1:8000:8000 -v bank:/bank hyperclip
FROM python:3.12-slim
RUN pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY . /source
RUN pip install --no-cache-dir '/source[serve]' && rm -rf /source
RUN useradd --uid 10001 hyperclip && install -d -o hyperclip /bank
USER hyperclip
WORKDIR /bank
VOLUME /bank
EXPOSE 8000
ENV HF_HUB_OFFLINE=1 OMP_NUM_THREADS=2
# 127.0.0.1 is a name that the server answers to, whatever --allow-host says.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["hyperclip", "serve", "--host", "0.0.0.0", "--bank", "/bank/tasks.safetensors", "--create"]
