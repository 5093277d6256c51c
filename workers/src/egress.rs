//! The one way out of the machine. Every outgoing call goes through here, so
//! that no playbook can reach what only this machine should (hazard S6).
//!
//! A forbidden address is refused at both places where an address can come
//! from: the URL itself, since a client skips its resolver for a literal, and
//! the resolver's answer, since a public name may point inside. There are no
//! redirects and no proxies, so the first URL is the only one.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use capx_core::domain::address::{Refused, Rules, WrongUrl};
use capx_core::domain::duration;
use capx_core::domain::outcome::{ErrorClass, Failure};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::{Client, Method, Response, Url};
use tokio::sync::{Semaphore, SemaphorePermit};

/// From so many bytes on, few bodies are held at once: see [`room_for`].
pub const LARGE_BYTES: usize = 1024 * 1024;
/// How many large bodies a process holds at once.
const LARGE_MAX: usize = 2;
static LARGE: Semaphore = Semaphore::const_new(LARGE_MAX);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const USER_AGENT: &str = concat!("capx/", env!("CARGO_PKG_VERSION"));

/// The client for outgoing calls, with its rules. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Egress {
    client: Client,
    /// For addresses that the operator has set.
    unguarded: Client,
    rules: Arc<Rules>,
}

struct Guard(Arc<Rules>);

impl Resolve for Guard {
    fn resolve(&self, name: Name) -> Resolving {
        let rules = Arc::clone(&self.0);
        Box::pin(async move {
            let host = name.as_str().to_owned();
            let found: Vec<SocketAddr> = tokio::net::lookup_host((host.as_str(), 0)).await?.collect();
            if found.iter().any(|address| !rules.permits(address.ip())) {
                return Err(Refused(host).into());
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// An outgoing call.
#[derive(Debug)]
pub struct Call {
    /// The method.
    pub method: Method,
    /// Where to.
    pub url: String,
    /// Headers, the caller's own.
    pub headers: Vec<(String, String)>,
    /// The body, with its content type when the headers name none.
    pub body: Option<(Vec<u8>, String)>,
    /// The same over every try of the same effect.
    pub idempotency_key: String,
    /// The whole call must be over by then.
    pub timeout: Duration,
    /// Something must come of it so often.
    pub idle: Duration,
    /// The largest answer that is read, in bytes.
    pub limit: usize,
    /// Held already, where the call's own body is large.
    pub large: Large,
    /// The operator has set the address: no rule is asked.
    pub trusted: bool,
}

/// Room for a large body, while this is held.
pub type Large = Option<SemaphorePermit<'static>>;

/// Waits for room for a body of so many bytes, if it is large.
pub async fn room_for(bytes: usize) -> Large {
    if bytes <= LARGE_BYTES {
        return None;
    }
    // It is never closed.
    LARGE.acquire().await.ok()
}

/// What came back.
#[derive(Debug)]
pub struct Answer {
    /// The status.
    pub status: u16,
    /// Headers whose values are text.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
    /// Held while the body is, where that is large.
    pub large: Large,
}

impl Answer {
    /// The value of a header, by its lower-case name.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    /// The failure that a status of 400 or above is.
    pub fn failure(&self) -> Option<Failure> {
        if self.status < 400 {
            return None;
        }
        let class = match self.status {
            429 => ErrorClass::RateLimited,
            408 | 425 | 500.. => ErrorClass::Transient,
            _ => ErrorClass::Invalid,
        };
        let said = String::from_utf8_lossy(&self.body);
        let mut failure = Failure::new(class, format!("the answer was {}: {}", self.status, excerpt(&said)));
        if matches!(self.status, 429 | 503) {
            // Seconds only: a date would have to be judged by our own clock.
            failure.retry_after =
                self.header("retry-after").and_then(|v| v.trim().parse().ok()).map(Duration::from_secs);
        }
        Some(failure)
    }
}

fn excerpt(text: &str) -> String {
    let mut short: String = text.chars().take(300).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

impl Egress {
    /// A client under the given rules.
    pub fn new(rules: Rules) -> Result<Self, String> {
        // May have been installed by another part of the process.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let rules = Arc::new(rules);
        let plain = || {
            Client::builder()
                .redirect(reqwest::redirect::Policy::none())
                .no_proxy()
                .connect_timeout(CONNECT_TIMEOUT)
                .user_agent(USER_AGENT)
        };
        let no_client = |error| format!("no HTTP client: {error}");
        let client = plain().dns_resolver(Arc::new(Guard(Arc::clone(&rules)))).build().map_err(no_client)?;
        Ok(Self { client, unguarded: plain().build().map_err(no_client)?, rules })
    }

    /// The client for addresses that the operator names, for protocols that make their own
    /// requests: no redirects, no proxies, as everywhere.
    pub fn of_operator(&self) -> Client {
        self.unguarded.clone()
    }

    fn check(&self, url: &str) -> Result<Url, Failure> {
        self.rules.check(url).map_err(|wrong| match wrong {
            WrongUrl::Refused(refused) => Failure::new(ErrorClass::Governance, refused.to_string()),
            other => Failure::invalid(other.to_string()),
        })
    }

    /// Whether a webhook may be at an address: what is told is spoken over TLS, but for networks that
    /// the operator has allowed.
    pub fn permits_webhook(&self, url: &str) -> Result<(), Failure> {
        let url = self.check(url)?;
        if url.scheme() == "https" || self.rules.allows_plain(&url) {
            return Ok(());
        }
        let why = "plain http is spoken to networks of CAPX_EGRESS_ALLOW alone";
        Err(Failure::new(ErrorClass::Governance, why))
    }

    /// Makes a call. An answer of any status is an answer; trouble on the way
    /// is a failure with its class.
    pub async fn call(&self, call: Call) -> Result<Answer, Failure> {
        self.open(call).await.map_err(|unanswered| unanswered.failure)?.whole().await
    }

    /// Makes a call whose answer is read as it comes.
    pub async fn open(&self, call: Call) -> Result<Open, Unanswered> {
        let (client, url) = match call.trusted {
            true => {
                (&self.unguarded, call.url.parse().map_err(|error| Failure::invalid(format!("{}: {error}", call.url)))?)
            }
            false => (&self.client, self.check(&call.url)?),
        };
        let mut request = client.request(call.method, url).timeout(call.timeout);
        for (name, value) in &call.headers {
            request = request.header(name, value);
        }
        if let Some((body, content_type)) = call.body {
            if !call.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type")) {
                request = request.header("content-type", content_type);
            }
            request = request.body(body);
        }
        let mut request = request.build().map_err(|error| Failure::invalid(format!("no valid request: {error}")))?;
        // They may hold what no log is to show.
        request.headers_mut().values_mut().for_each(|value| value.set_sensitive(true));
        // Ours and last, so that no header of a playbook can take its place.
        let key = call.idempotency_key.parse().map_err(|_| Failure::invalid("no valid idempotency key"))?;
        request.headers_mut().insert("idempotency-key", key);
        let response = match tokio::time::timeout(call.idle, client.execute(request)).await {
            Ok(Ok(response)) => response,
            Ok(Err(error)) => return Err(Unanswered { sent: !error.is_connect(), failure: trouble(&error) }),
            Err(_) => return Err(Unanswered { sent: true, failure: idle(call.idle) }),
        };
        let headers = response
            .headers()
            .iter()
            .filter_map(|(name, value)| Some((name.as_str().to_owned(), value.to_str().ok()?.to_owned())))
            .collect();
        let status = response.status().as_u16();
        Ok(Open { status, headers, response, idle: call.idle, limit: call.limit, read: 0, large: call.large })
    }
}

/// A call without an answer.
#[derive(Debug)]
pub struct Unanswered {
    /// Why.
    pub failure: Failure,
    /// The other side may have heard of it.
    pub sent: bool,
}

impl From<Failure> for Unanswered {
    /// Refused here, before anything was sent.
    fn from(failure: Failure) -> Self {
        Self { failure, sent: false }
    }
}

/// An answer that is under way.
#[derive(Debug)]
pub struct Open {
    /// The status.
    pub status: u16,
    /// Headers whose values are text.
    pub headers: Vec<(String, String)>,
    response: Response,
    idle: Duration,
    limit: usize,
    read: usize,
    large: Large,
}

impl Open {
    /// The value of a header, by its lower-case name.
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    /// What comes next of the body; nothing at its end.
    pub async fn next(&mut self) -> Result<Option<impl AsRef<[u8]> + use<>>, Failure> {
        let Some(chunk) = within(self.idle, self.response.chunk()).await? else { return Ok(None) };
        self.read += chunk.len();
        if self.read > self.limit {
            return Err(Failure::invalid(format!("the answer is larger than {} bytes", self.limit)));
        }
        if self.large.is_none() {
            self.large = room_for(self.read).await;
        }
        Ok(Some(chunk))
    }

    /// All of it.
    pub async fn whole(mut self) -> Result<Answer, Failure> {
        let mut body = Vec::new();
        while let Some(chunk) = self.next().await? {
            body.extend_from_slice(chunk.as_ref());
        }
        Ok(Answer { status: self.status, headers: self.headers, body, large: self.large })
    }
}

fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
}

/// A part of a call, as long as something comes of it in time.
async fn within<T>(limit: Duration, part: impl Future<Output = reqwest::Result<T>>) -> Result<T, Failure> {
    match tokio::time::timeout(limit, part).await {
        Ok(done) => done.map_err(|error| trouble(&error)),
        Err(_) => Err(idle(limit)),
    }
}

fn idle(limit: Duration) -> Failure {
    let limit = duration::written(limit);
    Failure::new(ErrorClass::Timeout, format!("nothing came for {limit}, the limit of `timeout.idle`"))
}

/// The whole chain of an error, since the outermost says only "error sending
/// request".
fn trouble(error: &reqwest::Error) -> Failure {
    let mut chain = Vec::new();
    let mut next: Option<&dyn std::error::Error> = Some(error);
    let mut refused = false;
    while let Some(current) = next {
        refused |= current.is::<Refused>();
        chain.push(current.to_string());
        next = current.source();
    }
    chain.dedup();
    let message = chain.last().cloned().unwrap_or_default();
    if refused {
        return Failure::new(ErrorClass::Governance, message);
    }
    if error.is_timeout() {
        return Failure::new(ErrorClass::Timeout, format!("no answer in time: {message}"));
    }
    if error.is_builder() {
        return Failure::invalid(format!("no valid request: {message}"));
    }
    Failure::transient(format!("the call failed: {message}"))
}

/// The host that a URL names, where it is one.
pub fn host_of(url: &str) -> Option<String> {
    Url::parse(url).ok()?.host_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(url: &str) -> Failure {
        let egress = Egress::new(Rules::default()).expect("a client");
        egress.check(url).expect_err(url)
    }

    #[test]
    fn every_spelling_of_an_inside_address_is_refused() {
        for host in [
            "127.0.0.1",
            "127.1",
            "0x7f.1",
            "0177.0.0.1",
            "2130706433",
            "0.0.0.0",
            "10.0.0.1",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "192.0.0.8",
            "198.18.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "224.0.0.1",
            "[::]",
            "[::1]",
            "[::ffff:169.254.169.254]",
            "[::ffff:7f00:1]",
            "[64:ff9b::a9fe:a9fe]",
            "[2002:7f00:1::]",
            "[fe80::1]",
            "[fc00::1]",
            "[fd12:3456::1]",
            "[ff02::1]",
            "[2001:db8::1]",
            "[::127.0.0.1]",
            "127.0.0.1.",
            "１２７.0.0.1",
        ] {
            let failure = refused(&format!("http://{host}/x"));
            assert_eq!(failure.class, ErrorClass::Governance, "{host}: {}", failure.message);
        }
    }

    #[test]
    fn only_plain_web_urls_are_urls() {
        for url in
            ["file:///etc/passwd", "gopher://x/", "unix:/x", "http://user:pw@example.com/", "http://", "nonsense"]
        {
            assert_eq!(refused(url).class, ErrorClass::Invalid, "{url}");
        }
    }

    #[test]
    fn public_addresses_and_allowed_networks_pass() {
        let egress = Egress::new(Rules::parse("10.1.0.0/16, 127.0.0.1").expect("rules")).expect("a client");
        for url in [
            "https://example.com/",
            "http://8.8.8.8/",
            "http://[2606:4700::1111]/",
            "http://10.1.2.3/",
            "http://127.0.0.1:8080/",
        ] {
            assert!(egress.check(url).is_ok(), "{url}");
        }
        assert!(egress.check("http://10.2.0.1/").is_err());
        assert!(Rules::parse("10.0.0.0/99").is_err());
        let loopback = Egress::new(Rules::default().with_loopback()).expect("a client");
        assert!(loopback.check("http://127.9.9.9/").is_ok());
        assert!(loopback.check("http://[::1]/").is_ok());
    }

    #[tokio::test]
    async fn a_public_name_that_points_inside_is_refused() {
        let egress = Egress::new(Rules::default()).expect("a client");
        let call = Call {
            method: Method::GET,
            url: "http://localhost:1/".into(),
            headers: Vec::new(),
            body: None,
            idempotency_key: "k".into(),
            timeout: Duration::from_secs(5),
            idle: Duration::from_secs(5),
            limit: 1,
            large: None,
            trusted: false,
        };
        let failure = egress.call(call).await.expect_err("refused");
        assert_eq!(failure.class, ErrorClass::Governance, "{}", failure.message);
    }
}
