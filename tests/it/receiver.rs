//! A receiver of webhooks, well-behaved or not, by the path that it is called at.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// A call that has come in.
#[derive(Debug, Clone)]
pub struct Call {
    pub path: String,
    pub headers: HashMap<String, String>,
    pub body: Vec<u8>,
    pub at: Instant,
}

impl Call {
    pub fn id(&self) -> &str {
        &self.headers["webhook-id"]
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

#[derive(Default)]
struct Seen {
    calls: Mutex<Vec<Call>>,
    /// `/switch` fails.
    fails: AtomicBool,
    /// Bytes that went out at `/huge`.
    sent: AtomicUsize,
}

pub struct Receiver {
    pub url: String,
    seen: Arc<Seen>,
}

impl Receiver {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let seen = Arc::<Seen>::default();
        let served = Arc::clone(&seen);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let seen = Arc::clone(&served);
                tokio::spawn(async move { serve(stream, &seen).await });
            }
        });
        Self { url, seen }
    }

    pub fn calls(&self) -> Vec<Call> {
        self.seen.calls.lock().unwrap().clone()
    }

    pub fn calls_at(&self, path: &str) -> Vec<Call> {
        self.calls().into_iter().filter(|call| call.path == path).collect()
    }

    pub fn count(&self) -> usize {
        self.seen.calls.lock().unwrap().len()
    }

    /// Bytes that went out at `/huge`.
    pub fn sent(&self) -> usize {
        self.seen.sent.load(Ordering::Relaxed)
    }

    /// Whether `/switch` fails.
    pub fn fail(&self, fails: bool) {
        self.seen.fails.store(fails, Ordering::Relaxed);
    }
}

/// Answers calls of one connection until it is over.
async fn serve(stream: TcpStream, seen: &Seen) -> Option<()> {
    stream.set_nodelay(true).ok()?;
    let mut stream = BufReader::new(stream);
    loop {
        let call = read(&mut stream).await?;
        let path = call.path.clone();
        seen.calls.lock().unwrap().push(call);
        let answer =
            |status: &str, more: &str| format!("HTTP/1.1 {status}\r\n{more}content-length: 2\r\n\r\nok").into_bytes();
        let bytes = match path.as_str() {
            "/fail" => answer("500 Internal Server Error", ""),
            "/switch" if seen.fails.load(Ordering::Relaxed) => answer("503 Service Unavailable", ""),
            "/no" => answer("400 Bad Request", ""),
            "/gone" => answer("410 Gone", ""),
            "/later" => answer("503 Service Unavailable", "retry-after: 99999999\r\n"),
            "/redirect" => answer("302 Found", "location: http://169.254.169.254/latest/meta-data\r\n"),
            "/hang" => std::future::pending().await,
            "/slow" => {
                tokio::time::sleep(Duration::from_millis(200)).await;
                answer("200 OK", "")
            }
            "/reset" => {
                stream.get_ref().set_zero_linger().ok()?;
                return None;
            }
            "/drip" => return drip(stream.into_inner()).await,
            "/huge" => return huge(stream.into_inner(), seen).await,
            "/wrong-length" => {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 99999\r\n\r\nshort").await.ok()?;
                return None;
            }
            "/nonsense" => {
                stream.write_all(b"\0\xff\xfe what?\r\n\r\n").await.ok()?;
                return None;
            }
            _ => answer("200 OK", ""),
        };
        stream.write_all(&bytes).await.ok()?;
    }
}

/// The answer's head, a byte at a time, for longer than anybody waits.
async fn drip(mut stream: TcpStream) -> Option<()> {
    for byte in b"HTTP/1.1 200 OK\r\nx-slow: ".iter().chain(std::iter::repeat(&b'x')) {
        stream.write_all(&[*byte]).await.ok()?;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    None
}

/// Ten gigabytes, as far as anybody takes them.
async fn huge(mut stream: TcpStream, seen: &Seen) -> Option<()> {
    stream.write_all(b"HTTP/1.1 500 Oops\r\ncontent-length: 10737418240\r\n\r\n").await.ok()?;
    let part = vec![b'x'; 65_536];
    loop {
        stream.write_all(&part).await.ok()?;
        seen.sent.fetch_add(part.len(), Ordering::Relaxed);
    }
}

async fn read(stream: &mut BufReader<TcpStream>) -> Option<Call> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let at = Instant::now();
    let head = String::from_utf8(head).unwrap();
    let mut lines = head.lines();
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let headers: HashMap<String, String> = lines
        .filter_map(|line| line.split_once(": "))
        .map(|(name, value)| (name.to_lowercase(), value.to_owned()))
        .collect();
    let mut body = vec![0; headers.get("content-length")?.parse().ok()?];
    stream.read_exact(&mut body).await.ok()?;
    Some(Call { path, headers, body, at })
}
