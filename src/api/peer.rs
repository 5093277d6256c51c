//! Where a request comes from: the connection's other end, or, behind a proxy
//! that the operator trusts, whom that one names.

use std::net::{IpAddr, SocketAddr};
use std::task::{Context, Poll};

use axum::http::{HeaderMap, Request};
use ipnet::IpNet;
use tower_service::Service;

/// The other end of a request's connection.
#[derive(Debug, Clone, Copy)]
pub struct Peer(pub IpAddr);

/// Tells the service behind it who is at the other end.
#[derive(Debug, Clone)]
pub(super) struct WithPeer<S> {
    inner: S,
    peer: Peer,
}

impl<S> WithPeer<S> {
    pub(super) fn new(inner: S, address: SocketAddr) -> Self {
        Self { inner, peer: Peer(address.ip().to_canonical()) }
    }
}

impl<S: Service<Request<B>>, B> Service<Request<B>> for WithPeer<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<B>) -> S::Future {
        request.extensions_mut().insert(self.peer);
        self.inner.call(request)
    }
}

/// Proxies whose `X-Forwarded-For` is believed.
#[derive(Debug, Clone, Default)]
pub struct TrustedProxies(Vec<IpNet>);

impl TrustedProxies {
    /// Reads a list of CIDRs, parted by commas.
    pub fn parse(list: &str) -> Result<Self, String> {
        list.split(',')
            .map(str::trim)
            .filter(|cidr| !cidr.is_empty())
            .map(|cidr| {
                cidr.parse()
                    .or_else(|_| cidr.parse::<IpAddr>().map(IpNet::from))
                    .map_err(|_| format!("CAPX_TRUSTED_PROXIES: `{cidr}` is not a network such as 10.0.0.0/8"))
            })
            .collect::<Result<_, _>>()
            .map(Self)
    }

    fn trusts(&self, address: IpAddr) -> bool {
        self.0.iter().any(|network| network.contains(&address))
    }

    /// Who a request comes from: the last address that no trusted proxy has.
    pub(super) fn client(&self, peer: IpAddr, headers: &HeaderMap) -> IpAddr {
        if !self.trusts(peer) {
            return peer;
        }
        let named = headers.get_all("x-forwarded-for").iter().filter_map(|value| value.to_str().ok());
        let mut hops: Vec<&str> = named.flat_map(|value| value.split(',')).map(str::trim).collect();
        let mut client = peer;
        while let Some(hop) = hops.pop() {
            let Ok(address) = hop.parse::<IpAddr>() else { break };
            client = address.to_canonical();
            if !self.trusts(client) {
                break;
            }
        }
        client
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_trusted_proxy_names_the_client_and_only_the_last_hop_counts() {
        let trusted = TrustedProxies::parse("10.0.0.0/8, 192.0.2.1").expect("a list");
        let mut headers = HeaderMap::new();
        headers.insert("x-forwarded-for", "203.0.113.9, 198.51.100.7, 10.1.1.1".parse().expect("a value"));
        let ip = |text: &str| text.parse::<IpAddr>().expect("an address");
        assert_eq!(trusted.client(ip("192.0.2.1"), &headers), ip("198.51.100.7"));
        assert_eq!(trusted.client(ip("203.0.113.1"), &headers), ip("203.0.113.1"));
        assert_eq!(TrustedProxies::default().client(ip("10.0.0.1"), &headers), ip("10.0.0.1"));
        assert!(TrustedProxies::parse("10.0.0.0/99").is_err());
    }
}
