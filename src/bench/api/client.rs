//! A client that costs little: one HTTP/1.1 connection each, one call at a time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use axum::body::{Body, Bytes};
use axum::http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// What is asked.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub method: &'static str,
    pub path: String,
    pub key: String,
    pub body: &'static str,
}

/// An open connection.
pub(super) struct Connection(SendRequest<Body>);

impl Connection {
    pub(super) async fn open(address: SocketAddr) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (sender, connection) = handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(Self(sender))
    }

    /// Sends a call; returns when the head of the answer is there.
    pub(super) async fn send(&mut self, call: &Call) -> anyhow::Result<Response<Incoming>> {
        let request = Request::builder()
            .method(call.method)
            .uri(&call.path)
            .header("host", "localhost")
            .header("authorization", format!("Bearer {}", call.key))
            .header("content-type", "application/json")
            .body(Body::from(call.body))?;
        self.0.ready().await?;
        Ok(self.0.send_request(request).await?)
    }

    /// The whole answer.
    pub(super) async fn call(&mut self, call: &Call) -> anyhow::Result<(StatusCode, Bytes)> {
        let response = self.send(call).await?;
        let status = response.status();
        Ok((status, axum::body::to_bytes(Body::new(response.into_body()), usize::MAX).await?))
    }

    /// The time of a call that must succeed.
    async fn timed(&mut self, call: &Call, began: Instant) -> anyhow::Result<Duration> {
        let (status, body) = self.call(call).await?;
        anyhow::ensure!(
            status.is_success(),
            "{} {}: {status} {}",
            call.method,
            call.path,
            String::from_utf8_lossy(&body)
        );
        Ok(began.elapsed())
    }
}

/// Calls one after the other on every connection; how many a second there were.
pub(super) async fn saturate(
    address: SocketAddr,
    connections: usize,
    time: Duration,
    call: impl Fn(usize) -> Call,
) -> anyhow::Result<f64> {
    let mut tasks = Vec::new();
    let start = Arc::new(tokio::sync::Barrier::new(connections));
    for n in 0..connections {
        let (call, start) = (call(n), Arc::clone(&start));
        let mut connection = Connection::open(address).await?;
        tasks.push(tokio::spawn(async move {
            connection.timed(&call, Instant::now()).await?;
            start.wait().await;
            let (end, mut count) = (Instant::now() + time, 0_usize);
            while Instant::now() < end {
                connection.timed(&call, Instant::now()).await?;
                count += 1;
            }
            anyhow::Ok(count)
        }));
    }
    let mut count = 0;
    for task in tasks {
        count += task.await??;
    }
    Ok(count as f64 / time.as_secs_f64())
}

/// Calls at a rate, spread over the connections; how long each took, from the
/// time when it was due if the one before it held it up.
pub(super) async fn pace(
    address: SocketAddr,
    connections: usize,
    rate: usize,
    time: Duration,
    call: impl Fn(usize) -> Call,
) -> anyhow::Result<Vec<Duration>> {
    let between = Duration::from_secs_f64(connections as f64 / rate as f64);
    let mut tasks = Vec::new();
    for n in 0..connections {
        let call = call(n);
        let mut connection = Connection::open(address).await?;
        tasks.push(tokio::spawn(async move {
            connection.timed(&call, Instant::now()).await?;
            let mut due = Instant::now() + between.mul_f64(n as f64 / connections as f64);
            let end = due + time;
            let mut took = Vec::new();
            while due < end {
                let late = Instant::now() > due;
                tokio::time::sleep_until(due.into()).await;
                let began = if late { due } else { Instant::now() };
                took.push(connection.timed(&call, began).await?);
                due += between;
            }
            anyhow::Ok(took)
        }));
    }
    let mut took = Vec::new();
    for task in tasks {
        took.extend(task.await.context("a client")??);
    }
    Ok(took)
}
