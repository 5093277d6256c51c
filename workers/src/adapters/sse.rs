//! Server-sent events out of bytes, as far as providers use them: fields `event` and
//! `data`, by the WHATWG's specification of event streams.

/// An event is at most so large, in bytes.
const EVENT_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Takes bytes and gives the data of whole events.
#[derive(Debug, Default)]
pub(super) struct Events {
    rest: Vec<u8>,
    /// So much of that holds no end of a line.
    scanned: usize,
    data: String,
}

impl Events {
    /// The data of the events that these bytes complete, in order.
    pub fn take(&mut self, bytes: &[u8]) -> Result<Vec<String>, &'static str> {
        self.rest.extend_from_slice(bytes);
        let mut events = Vec::new();
        let mut from = 0;
        while let Some(at) = self.rest[from + self.scanned..].iter().position(|b| *b == b'\n') {
            let at = std::mem::take(&mut self.scanned) + at;
            let line = self.rest[from..from + at].strip_suffix(b"\r").unwrap_or(&self.rest[from..from + at]);
            let line = std::str::from_utf8(line).map_err(|_| "the stream is no UTF-8")?;
            if line.is_empty() {
                if !self.data.is_empty() {
                    events.push(std::mem::take(&mut self.data));
                }
            } else if let Some(data) = line.strip_prefix("data:") {
                if !self.data.is_empty() {
                    self.data.push('\n');
                }
                self.data.push_str(data.strip_prefix(' ').unwrap_or(data));
            }
            from += at + 1;
        }
        self.rest.drain(..from);
        self.scanned = self.rest.len();
        if self.rest.len() + self.data.len() > EVENT_BYTES_MAX {
            return Err("an event of the stream is too large");
        }
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_whole_however_their_bytes_come() {
        let stream = ": hello\nevent: x\ndata: {\"a\":\ndata: 1}\n\nid: 3\r\ndata: ü\r\n\r\ndata: cut".as_bytes();
        for size in 1..stream.len() {
            let mut events = Events::default();
            let all: Vec<String> = stream.chunks(size).flat_map(|chunk| events.take(chunk).expect("events")).collect();
            assert_eq!(all, ["{\"a\":\n1}", "ü"], "by {size}");
        }
        assert!(Events::default().take(b"data: \xff\n\n").is_err());
        let mut endless = Events::default();
        let mut taken = Ok(Vec::new());
        for _ in 0..10 {
            taken = endless.take(&vec![b'x'; 1024 * 1024]);
        }
        assert!(taken.is_err());
    }
}
