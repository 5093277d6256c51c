//! A TCP proxy before the tests' Postgres, whose line can be cut and can fall
//! silent.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

#[derive(Debug, Clone, Copy, PartialEq)]
enum Line {
    /// Bytes pass.
    Open,
    /// Nothing passes, and nobody is told: a partition.
    Silent,
    /// Open connections break, and new ones do at once.
    Cut,
}

/// The proxy; dropping it cuts the line for good.
pub struct Proxy {
    pub port: u16,
    line: Arc<Mutex<watch::Sender<Line>>>,
    /// The lines of connections that stay silent for ever.
    stranded: Mutex<Vec<watch::Sender<Line>>>,
    dropped: Arc<AtomicUsize>,
}

impl Proxy {
    /// Starts one before a port of this machine.
    pub async fn start(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let line = Arc::new(Mutex::new(watch::Sender::new(Line::Open)));
        let dropped = Arc::new(AtomicUsize::new(0));
        let (current, count) = (Arc::downgrade(&line), Arc::clone(&dropped));
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let Some(current) = current.upgrade() else { return };
                let (line, count) = (current.lock().unwrap().subscribe(), Arc::clone(&count));
                let mut cut = line.clone();
                tokio::spawn(async move {
                    tokio::select! {
                        biased;
                        _ = cut.wait_for(|line| *line == Line::Cut) => { count.fetch_add(1, Relaxed); }
                        () = carry(client, to, line) => {}
                    }
                });
            }
        });
        Self { port, line, stranded: Mutex::default(), dropped }
    }

    /// Breaks every connection and refuses new ones.
    pub fn cut(&self) {
        self.line.lock().unwrap().send_replace(Line::Cut);
    }

    /// Leaves connections open, and lets nothing pass.
    pub fn silence(&self) {
        self.line.lock().unwrap().send_replace(Line::Silent);
    }

    /// Leaves the connections that are open in silence for ever; new ones are
    /// as good as any. So does a failover, or a NAT that forgets.
    pub fn strand(&self) {
        let old = std::mem::replace(&mut *self.line.lock().unwrap(), watch::Sender::new(Line::Open));
        old.send_replace(Line::Silent);
        self.stranded.lock().unwrap().push(old);
    }

    /// Lets bytes pass again.
    pub fn restore(&self) {
        self.line.lock().unwrap().send_replace(Line::Open);
    }

    /// How many connections were broken or refused.
    pub fn dropped(&self) -> usize {
        self.dropped.load(Relaxed)
    }
}

async fn carry(client: TcpStream, to: u16, mut line: watch::Receiver<Line>) {
    if line.wait_for(|line| *line == Line::Open).await.is_err() {
        return;
    }
    let Ok(server) = TcpStream::connect(("127.0.0.1", to)).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    // Whichever side ends, both do.
    tokio::select! {
        () = copy(from_client, to_server, line.clone()) => {}
        () = copy(from_server, to_client, line) => {}
    }
}

async fn copy(
    mut from: impl AsyncReadExt + Unpin,
    mut to: impl AsyncWriteExt + Unpin,
    mut line: watch::Receiver<Line>,
) {
    let mut bytes = vec![0; 16 * 1024];
    while let Ok(read @ 1..) = from.read(&mut bytes).await {
        let open = line.wait_for(|line| *line == Line::Open).await.is_ok();
        if !open || to.write_all(&bytes[..read]).await.is_err() {
            return;
        }
    }
}
