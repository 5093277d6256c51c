//! Server-sent events, as far as ours go.

use reqwest::Method;
use serde_json::Value;

use super::client::Client;

/// An event larger than that is none of ours.
const EVENT_BYTES_MAX: usize = 4 << 20;

/// A stream of events, which goes on where it broke.
pub(super) struct Events<'a> {
    client: &'a Client,
    path: String,
    last: Option<String>,
    answer: Option<reqwest::Response>,
    buffer: Vec<u8>,
}

impl<'a> Events<'a> {
    pub(super) fn of(client: &'a Client, path: String) -> Self {
        Self { client, path, last: None, answer: None, buffer: Vec::new() }
    }

    /// The next event; none when the connection has ended. Asked again, the stream
    /// goes on behind the last event that was given.
    pub(super) async fn next(&mut self) -> anyhow::Result<Option<Value>> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|two| two == b"\n\n") {
                let frame: Vec<u8> = self.buffer.drain(..end + 2).collect();
                match self.read(&String::from_utf8_lossy(&frame)) {
                    Some(event) => return Ok(Some(event)),
                    None => continue,
                }
            }
            let chunk = match &mut self.answer {
                None => {
                    self.open().await?;
                    continue;
                }
                Some(answer) => answer.chunk().await,
            };
            match chunk {
                Ok(Some(chunk)) if self.buffer.len() + chunk.len() <= EVENT_BYTES_MAX => {
                    self.buffer.extend_from_slice(&chunk)
                }
                _ => {
                    self.answer = None;
                    self.buffer.clear();
                    return Ok(None);
                }
            }
        }
    }

    async fn open(&mut self) -> anyhow::Result<()> {
        let mut request = self.client.request(Method::GET, &self.path).header("accept", "text/event-stream");
        if let Some(last) = &self.last {
            request = request.header("last-event-id", last);
        }
        let answer = request.send().await.map_err(|error| self.client.away(&error.into()))?;
        if answer.status().is_success() {
            self.answer = Some(answer);
            return Ok(());
        }
        self.client.answered(answer).await.map(|_| ())
    }

    fn read(&mut self, frame: &str) -> Option<Value> {
        let field = |name: &str| frame.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        let event = serde_json::from_str(field("data")?).ok()?;
        self.last = field("id").map(str::to_owned).or(self.last.take());
        Some(event)
    }
}
